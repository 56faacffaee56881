"""Says which implementation a call would run, and why."""

from typing import NamedTuple

import jax

from jax_kvcache import _ffi
from jax_kvcache._checks import Call, check_call
from jax_kvcache._op import canonical_operands


class Explanation(NamedTuple):
    """What a call would run.

    `implementation` is "ffi" or "xla", or None when the call would raise.
    """

    platform: str
    implementation: str | None
    reason: str

    def __str__(self):
        runs = self.implementation or "nothing (it raises NotImplementedError)"
        return f"{self.platform}: {runs}: {self.reason}"


def explain(*args, platform: str | None = None, **kwargs) -> Explanation:
    """Says which implementation `dequant_rope_quant_kvcache` would run for these arguments.

    Nothing is computed: arrays may be given as `jax.ShapeDtypeStruct`.

    Args:
      *args: as for `dequant_rope_quant_kvcache`.
      platform: the platform to answer for; None is JAX's default backend.
      **kwargs: as for `dequant_rope_quant_kvcache`.

    Returns:
      An `Explanation` (platform, implementation, reason).

    Raises:
      TypeError, ValueError: as `dequant_rope_quant_kvcache`.
    """
    call = Call(*args, **kwargs)
    check_call(call)
    call = call._replace(size_splits=None)  # checked, and the shapes say the same
    arrays = {k: v for k, v in call._asdict().items() if getattr(v, "shape", ()) != ()}
    operands = jax.eval_shape(
        lambda arrays: canonical_operands(call._replace(**arrays))[0],
        {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in arrays.items()},
    )
    if platform is not None and not isinstance(platform, str):
        raise TypeError(f"`platform` must be a str, got {platform!r}.")
    platform = platform or jax.default_backend()
    asked = call.implementation
    if asked == "xla":
        return Explanation(platform, "xla", "asked for")
    reason = _ffi.refusal(platform, operands)
    if reason is None:
        reason = f"the native target '{_ffi.TARGET}' takes this call"
        if missing := _ffi.unavailable(platform):
            reason += f" when it is lowered for another machine ({missing})"
        return Explanation(platform, "ffi", reason)
    return Explanation(platform, None if asked == "ffi" else "xla", reason)
