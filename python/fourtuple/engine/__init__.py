"""The only door to the compiled half: what an engine is asked, and what it says.

Configuration crosses once, as one frozen dataclass (`configs`); numbers come back as one `Snapshot`, as often as
somebody asks. No Python runs per connection. Defines nothing itself.
"""

from fourtuple.engine.checks import HIGHEST_COUNT
from fourtuple.engine.configs import (
    DOORS,
    MOTD_BYTES,
    PATTERN_BYTES,
    PATTERN_ENDS,
    BrokerConfig,
    BrokerListener,
    BytePattern,
    CarrierName,
    CarrierSettings,
    Door,
    EchoConfig,
    LoadConfig,
    Manners,
    PostgresTls,
    SourceChoice,
    TlsConfig,
)
from fourtuple.engine.engine import (
    CONNECTIONS_PER_WORKER,
    PROGRAM_VERSION,
    SECURED_PER_WORKER,
    Engine,
    raise_soft_descriptors,
    uring_abilities,
)
from fourtuple.engine.snapshot import CarrierNumbers, Failure, Phase, Quantiles, Snapshot
from fourtuple.engine.sniffing import PROBES, PROTOCOLS, Prelude, Sniffed, sniff

__all__ = [
    "CONNECTIONS_PER_WORKER",
    "DOORS",
    "HIGHEST_COUNT",
    "MOTD_BYTES",
    "PATTERN_BYTES",
    "PATTERN_ENDS",
    "PROBES",
    "PROGRAM_VERSION",
    "PROTOCOLS",
    "SECURED_PER_WORKER",
    "BrokerConfig",
    "BrokerListener",
    "BytePattern",
    "CarrierName",
    "CarrierNumbers",
    "CarrierSettings",
    "Door",
    "EchoConfig",
    "Engine",
    "Failure",
    "LoadConfig",
    "Manners",
    "Phase",
    "PostgresTls",
    "Prelude",
    "Quantiles",
    "Snapshot",
    "Sniffed",
    "SourceChoice",
    "TlsConfig",
    "raise_soft_descriptors",
    "sniff",
    "uring_abilities",
]
