"""Four CPU devices in every test process; whoever names no mesh runs on the first alone."""

import jax

jax.config.update("jax_num_cpu_devices", 4)
