"""What computes the rules' steps where plain torch is slow: C++ compiled on the user's machine, and Triton on a GPU.

`native` is the LSTM rules' kernel (what it is built for and called with: `native_shape`, `native_calls`),
`basis_native` that of the eigenbasis, `build` compiles both when they are first needed, and `fused` is a step on a GPU.
Every one of them is a second route to numbers that plain torch gives, too, and is tested against it.
"""
