"""The credentials with which the processes of one cluster prove that they belong to it.

Ray hands them to routers and workers. No connection of ours carries the key or the secret.
"""

from __future__ import annotations

import datetime
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, Self

import grpc
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

_NAME: Final = "baton-cluster"  # all members present the same certificate, whatever their address
_VALID_DAYS: Final = 3650  # credentials live as long as the cluster, which may be years


@dataclass(frozen=True, slots=True)
class ClusterCredentials:
    """The credentials that all routers and workers of one cluster share.

    Routers and workers connect with TLS. Both sides present this certificate and accept no other.
    """

    certificate: bytes  # PEM; it is its own authority
    key: bytes = field(repr=False)  # PEM
    kv_secret: str = field(repr=False)  # protects the KV control connections, see kv_transfer.curve

    @classmethod
    def create(cls) -> Self:
        """Return new credentials."""
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, _NAME)])
        day, now = datetime.timedelta(days=1), datetime.datetime.now(datetime.UTC)
        uses = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
        certificate = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - day)  # the clocks of machines differ
            .not_valid_after(now + _VALID_DAYS * day)
            .add_extension(x509.SubjectAlternativeName([x509.DNSName(_NAME)]), critical=False)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(x509.ExtendedKeyUsage(uses), critical=False)
            .sign(key, hashes.SHA256())
        )
        return cls(
            certificate.public_bytes(serialization.Encoding.PEM),
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            ),
            secrets.token_hex(32),
        )

    def for_server(self) -> grpc.ServerCredentials:
        """Return the credentials of a server that accepts only members of the cluster."""
        return grpc.ssl_server_credentials(
            [(self.key, self.certificate)],
            root_certificates=self.certificate,
            require_client_auth=True,
        )

    def for_channel(self) -> grpc.ChannelCredentials:
        """Return the credentials of a channel to a member. Needs ``CHANNEL_OPTIONS``."""
        return grpc.ssl_channel_credentials(
            root_certificates=self.certificate,
            private_key=self.key,
            certificate_chain=self.certificate,
        )


def open_channel(
    address: str,
    credentials: ClusterCredentials | None,
    options: Sequence[tuple[str, int]] = (),
) -> grpc.aio.Channel:
    """Open a channel to a worker. Without credentials, it has no TLS, for tests."""
    if credentials is None:
        return grpc.aio.insecure_channel(address, options)
    return grpc.aio.secure_channel(address, credentials.for_channel(), (*options, *CHANNEL_OPTIONS))


# gRPC compares the name in the certificate with this one instead of the address.
CHANNEL_OPTIONS: Final = (("grpc.ssl_target_name_override", _NAME),)
