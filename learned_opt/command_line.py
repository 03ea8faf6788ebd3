"""What the training script's command line needs beside tyro: dictionaries as YAML, and one voice for several ranks."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from learned_opt import config as configuration

if TYPE_CHECKING:
    import tyro

T = TypeVar("T")


def yaml_dicts() -> tyro.constructors.ConstructorRegistry:
    """Dictionaries on the command line are YAML: --rule-settings '{hidden_size: 4}'."""
    import tyro
    import yaml

    registry = tyro.constructors.ConstructorRegistry()

    @registry.primitive_rule
    def _(info: tyro.constructors.PrimitiveTypeInfo) -> tyro.constructors.PrimitiveConstructorSpec[Any] | None:
        if info.type_origin is not dict:
            return None

        def read(strings: list[str]) -> dict[str, Any]:
            value = configuration.read_yaml(strings[0])
            if not isinstance(value, dict):
                raise ValueError(f"{strings[0]!r} is not a YAML mapping such as {{hidden_size: 4}}")
            return value

        return tyro.constructors.PrimitiveConstructorSpec(
            nargs=1,
            metavar="YAML",
            instance_from_str=read,
            is_instance=lambda value: isinstance(value, dict),
            str_from_instance=lambda value: [
                yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10**6).strip()
            ],
        )

    return registry


def quietly(parse: Callable[[Sequence[str]], T], argv: Sequence[str], *, speak: bool) -> T:
    """`parse(argv)`; unless told to speak, what it prints before it gives up becomes the text of an error.

    Raises:
        ValueError: `parse` gave up, silently.
    """
    if speak:
        return parse(argv)
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            return parse(argv)
    except SystemExit as stop:
        if not stop.code:
            raise
        raise ValueError(said.getvalue().strip()) from None
