"""The sections of `benchmarks/gpu.py`. What its command needs without importing JAX is here."""

DETERMINISTIC = "--xla_gpu_deterministic_ops=true"  # what XLA's own scatters need to add in a fixed order

# Trainings of the section `twins`: their backends, None being the library's own choice, and XLA's flag.
TWINS = {
    "ours": (None, ""),
    "ours, deterministic": (None, DETERMINISTIC),
    "xla": ("xla", ""),
    "xla, deterministic": ("xla", DETERMINISTIC),
}
