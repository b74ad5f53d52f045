"""What an encoder can be served in, by PyTorch's names (`Encoder.served`); without PyTorch, for command lines."""

DTYPES = ("float32", "bfloat16", "float16", "int8")
