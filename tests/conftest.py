"""Four CPU devices in every test process; whoever names no mesh runs on the first alone."""

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 4)
pytest.register_assert_rewrite("support")  # so that its assertions show values
