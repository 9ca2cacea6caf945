"""For benchmarks on torch before 2.12, and for nothing else: its varlen attention with the argument that Unsloth asks for.

Import before unsloth. Ferry's own lock has torch 2.13, which needs none of this. There Unsloth passes `enable_gqa`; the kernels
below it have always taken fewer heads for keys and values.
"""

import inspect

from torch.nn.attention import varlen

NAME = "enable_gqa"
ADAPTED = NAME not in inspect.signature(varlen.varlen_attn).parameters

if ADAPTED:
    real, given = varlen.varlen_attn, inspect.signature(varlen.varlen_attn)

    def varlen_attn(*args, enable_gqa: bool = False, **kwargs):
        return real(*args, **kwargs)

    added = inspect.Parameter(NAME, inspect.Parameter.KEYWORD_ONLY, default=False)
    varlen_attn.__signature__ = given.replace(parameters=[*given.parameters.values(), added])
    varlen.varlen_attn = varlen_attn
    varlen._should_use_cudnn = lambda index: False  # cuDNN's path does not know it
