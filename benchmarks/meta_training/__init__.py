"""How fast this library meta-trains, beside a plain PyTorch loop and a strong JAX version; see docs/speed.md."""
