"""A mechanism for the tests of planning: Skellam noise on updates of which rounding adds d/4 to the squared norm.

It derives no more than planning looks at, and refuses rings that are too narrow as the real one does.
"""

import math
from dataclasses import dataclass

from maskwork.privacy.events import PrivacyEvent, SkellamRelease
from maskwork.privacy.planning import Setting

HEADROOM = 8
"""Standard deviations of noise that the ring has room for."""


@dataclass(frozen=True)
class SimpleRelease:
    setting: Setting
    noise_multiplier: float
    ring_bits: int
    scaled_norm: float
    sensitivity: float

    @property
    def inflation(self) -> float:
        return self.sensitivity / self.scaled_norm

    def events(self, honest: int) -> tuple[PrivacyEvent, ...]:
        assert honest == self.setting.honest
        bound = self.sensitivity
        l1 = min(bound * math.sqrt(self.setting.parameters), bound**2)
        return (SkellamRelease(l1, bound, (self.noise_multiplier * bound) ** 2, 1e-30),)


def simple_mechanics(setting: Setting, noise_multiplier: float, ring_bits: int) -> SimpleRelease:
    """A norm of 2^k steps, as large as the ring has room for."""
    room = 2.0 ** (ring_bits - 1)
    for k in range(20, 0, -1):
        norm = 2.0**k
        bound = math.sqrt(norm**2 + setting.parameters / 4)
        noise = HEADROOM * noise_multiplier * bound * math.sqrt(setting.participants / setting.honest)
        if setting.participants * norm + noise < room:
            if bound / norm > 1.25:
                break
            return SimpleRelease(setting, noise_multiplier, ring_bits, norm, bound)
    raise ValueError(f"a ring of {ring_bits} bits is too narrow here: more bits would do")
