"""How many examples a property test tries: few each time the tests run, and the same; many with the profile `slow`.

WHISPER_AT_PROPERTIES=slow pytest tests/test_properties_*.py
"""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

PROFILE = os.environ.get("WHISPER_AT_PROPERTIES", "default")
TIMES = {"default": 1, "slow": 20}[PROFILE]
SLOW_TO_MAKE = (HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much)

settings.register_profile(
    "default", deadline=None, derandomize=True, database=None, suppress_health_check=SLOW_TO_MAKE
)  # fmt: skip
settings.register_profile("slow", deadline=None, database=None, print_blob=True, suppress_health_check=SLOW_TO_MAKE)


def examples(count: int, **options) -> settings:
    """Settings of a test with so many examples, times the profile's factor."""
    return settings(settings.get_profile(PROFILE), max_examples=count * TIMES, **options)
