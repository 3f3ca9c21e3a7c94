"""Certificates for the servers of a test: an authority made for it, and what it signs, good or with one fault."""

from __future__ import annotations

import datetime
import ipaddress
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

_DAY = datetime.timedelta(days=1)


@dataclass(frozen=True)
class Files:
    """A chain and its key, as servers want them: apart, and in one file (HAProxy)."""

    chain: Path
    key: Path
    both: Path


class Authority:
    """Signs. Its own certificate is in `ca`."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name = folder, _name(name)
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.certificate = (
            _builder(self.name, self.name, self.key.public_key(), age_days=1)
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .sign(self.key, hashes.SHA256())
        )
        self.ca = folder / f"{name}.pem"
        self.ca.write_bytes(_pem(self.certificate))

    @classmethod
    def made(cls, folder: Path, name: str) -> Self:
        """In a folder of its own."""
        (folder / name).mkdir()
        return cls(folder / name, name)

    def sign(self, *names: str, age_days: int = 1) -> Files:
        """For these names and addresses, valid for 90 days from so many days ago."""
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = (
            _builder(_name(names[0]), self.name, key.public_key(), age_days=age_days)
            .add_extension(x509.SubjectAlternativeName([_alternative(name) for name in names]), critical=False)
            .sign(self.key, hashes.SHA256())
        )
        plain = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        stem = f"{names[0]}-{age_days}"
        files = Files(
            chain=self.folder / f"{stem}.crt", key=self.folder / f"{stem}.key", both=self.folder / f"{stem}.both"
        )
        chain = _pem(certificate) + _pem(self.certificate)
        files.chain.write_bytes(chain)
        files.key.write_bytes(plain)
        files.both.write_bytes(chain + plain)
        return files

    def own(self) -> Files:
        """Its own certificate, as if it were a server's."""
        plain = self.key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        key = self.folder / "own.key"
        key.write_bytes(plain)
        return Files(chain=self.ca, key=key, both=self.ca)


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, *, age_days: int
) -> x509.CertificateBuilder:
    begin = datetime.datetime.now(datetime.UTC) - age_days * _DAY
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(begin)
        .not_valid_after(begin + 90 * _DAY)
    )


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _alternative(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)
