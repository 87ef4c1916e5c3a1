"""What holds for every test."""

from hypothesis import HealthCheck, settings

# Nothing depends on how fast the machine is.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")
