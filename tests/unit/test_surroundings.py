"""Services as the supervisor finds them: those of the file as it was read last, or of the registry."""

from __future__ import annotations

from pathlib import Path

from msgspec.structs import replace

from fourtuple.confinement.connecting import packed
from fourtuple.registry import Registry
from fourtuple.services import Match, Route, Service
from fourtuple.supervisor.spec import Spec
from fourtuple.supervisor.surroundings import Services

_FILE = """
[[listen]]
address = "127.0.0.1:700"
default = "tcp:127.0.0.1:{port}"
[[service]]
name = "shop.example"
target = "tcp:127.0.0.2:{port}"
"""


def leads_to(services: Services, *targets: str) -> bool:
    """Whether each of them is among the addresses."""
    known = tuple(services.addresses())
    return all(any(packed(one) in some for some in known) for one in targets)


def test_a_file_that_is_read_again_has_other_services() -> None:
    spec = Spec(named="broker.toml", text=_FILE.format(port=1))
    services = Services(lambda: spec)
    assert services.find("shop.example") == Service(name="shop.example", target="tcp:127.0.0.2:1")
    assert leads_to(services, "tcp:127.0.0.1:1", "tcp:127.0.0.2:1")
    assert not leads_to(services, "tcp:127.0.0.1:2")
    version = services.version()
    assert services.version() == version
    spec = replace(spec, text=_FILE.format(port=2))
    assert services.version() != version
    assert services.find("shop.example") == Service(name="shop.example", target="tcp:127.0.0.2:2")
    assert leads_to(services, "tcp:127.0.0.1:2", "tcp:127.0.0.2:2")
    assert not leads_to(services, "tcp:127.0.0.1:1")
    assert services.find("other.example") is None


def test_a_registry_has_what_it_has_now(tmp_path: Path) -> None:
    with Registry(tmp_path / "store") as registry:
        registry.add([Service(name="a.example", target="tcp:127.0.0.3:1")])
        services = Services(lambda: Spec(named="broker.toml", text=_FILE.format(port=1), store=str(tmp_path / "store")))
        assert services.find("a.example") is not None
        version = services.version()
        registry.add([Service(name="b.example", target="tcp:127.0.0.4:1")])
        registry.add_route(Route(match=Match(name="*.c.example"), to="tcp:127.0.0.5:1"))
        assert services.version() != version
        assert leads_to(services, "tcp:127.0.0.3:1", "tcp:127.0.0.4:1", "tcp:127.0.0.5:1")
        assert not leads_to(services, "tcp:127.0.0.6:1")
        services.close()
        # It is opened again by whoever asks.
        assert services.find("b.example") is not None
        services.close()
