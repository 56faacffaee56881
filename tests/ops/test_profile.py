"""A profile says which of its operations are the operators': a scope with the operator's name."""

import functools
import re

import jax
import pytest
from support import calls
from support.attention import Call

from jax_kvcache import decode_attention, dequant_rope_quant_kvcache


def write(implementation):
    call = calls.ones(B=2, S=1, Nq=4, Nkv=2, D=8, C1=2, C2=8)
    operator = functools.partial(dequant_rope_quant_kvcache, implementation=implementation)
    return lambda call: operator(**call), (call,)


def read(implementation):
    q, cache, keywords = Call().draw()
    return functools.partial(decode_attention, implementation=implementation, **keywords), (
        q,
        cache,
    )


OPERATORS = {"dequant_rope_quant_kvcache": write, "decode_attention": read}


@pytest.mark.parametrize("implementation", ["xla", "ffi"])
@pytest.mark.parametrize("name", OPERATORS)
def test_the_operators_name_is_in_a_profile(name, implementation, tmp_path):
    operator, arguments = OPERATORS[name](implementation)

    def run(*arguments):
        return operator(*arguments)

    compiled = jax.jit(run).lower(*arguments).compile()
    jax.block_until_ready(compiled(*arguments))
    with jax.profiler.trace(tmp_path):
        jax.block_until_ready(compiled(*arguments))
    [path] = tmp_path.rglob("*.xplane.pb")
    profile = jax.profiler.ProfileData.from_file(str(path))
    ran = {e.name for plane in profile.planes for line in plane.lines for e in line.events}
    # The profile holds the program, whose instructions its events name.
    scope = rf"jit\(run\)/[\w/]*\b{name}/"
    assert re.search(scope.encode(), path.read_bytes())
    scopes = dict(re.findall(r'%([\w.-]+) = .*metadata=\{op_name="([^"]*)"', compiled.as_text()))
    ours = [operation for operation in ran & set(scopes) if re.match(scope, scopes[operation])]
    if implementation == "ffi":
        assert any(scopes[operation].endswith(f"{name}/ffi_call") for operation in ours)
    else:
        assert len(ours) > len(ran & set(scopes)) / 2
