"""Make the cluster's certificates and keys with openssl."""

from dataclasses import dataclass
from pathlib import Path

from localcluster.files import write_text
from localcluster.shell import run

VALID_DAYS = "3650"


@dataclass(frozen=True)
class ClientIdentity:
    """A user of the API server, as its certificate names it."""

    name: str
    user: str
    group: str | None = None

    @property
    def subject(self) -> str:
        """Return the subject of the certificate in openssl's form."""
        return (f"/O={self.group}" if self.group else "") + f"/CN={self.user}"


def ensure_certificates(
    folder: Path, *, clients: tuple[ClientIdentity, ...], server_names: tuple[str, ...], server_ips: tuple[str, ...]
) -> None:
    """Make what is missing: the authority, the service-account keys, the client and the server certificates."""
    folder.mkdir(parents=True, exist_ok=True)
    _ensure_authority(folder)
    _ensure_service_account_keys(folder)
    for client in clients:
        _ensure_signed(folder, name=client.name, subject=client.subject, extensions="extendedKeyUsage=clientAuth\n")
    alternatives = ",".join([*(f"DNS:{name}" for name in server_names), *(f"IP:{ip}" for ip in server_ips)])
    extensions = f"extendedKeyUsage=serverAuth\nsubjectAltName={alternatives}\n"
    _ensure_signed(folder, name="apiserver", subject="/CN=kube-apiserver", extensions=extensions)


def _ensure_authority(folder: Path) -> None:
    if (folder / "ca.crt").exists():
        return
    _make_key(folder / "ca.key")
    certificate = folder / ".ca.crt"
    usage = "keyUsage=critical,keyCertSign,cRLSign,digitalSignature"
    subject = ("-subj", "/CN=local-cluster-ca", "-addext", usage)
    key = folder / "ca.key"
    run(["openssl", "req", "-x509", "-new", "-key", key, "-days", VALID_DAYS, *subject, "-out", certificate])
    certificate.replace(folder / "ca.crt")


def _ensure_service_account_keys(folder: Path) -> None:
    if (folder / "sa.pub").exists():
        return
    _make_key(folder / "sa.key")
    write_text(folder / "sa.pub", run(["openssl", "pkey", "-in", folder / "sa.key", "-pubout"]))


def _ensure_signed(folder: Path, *, name: str, subject: str, extensions: str) -> None:
    wanted = folder / f"{name}.ext"
    text = f"basicConstraints=CA:FALSE\n{extensions}"
    if (folder / f"{name}.crt").exists() and wanted.exists() and wanted.read_text() == text:
        return
    _make_key(folder / f"{name}.key")
    write_text(wanted, text)
    request = run(["openssl", "req", "-new", "-key", folder / f"{name}.key", "-subj", subject])
    certificate = folder / f".{name}.crt"
    authority = ("-CA", folder / "ca.crt", "-CAkey", folder / "ca.key", "-days", VALID_DAYS)
    serial = "0x" + run(["openssl", "rand", "-hex", "8"]).strip()
    run(
        ["openssl", "x509", "-req", *authority, "-set_serial", serial, "-extfile", wanted, "-out", certificate],
        stdin=request,
    )
    certificate.replace(folder / f"{name}.crt")


def _make_key(path: Path) -> None:
    write_text(path, run(["openssl", "ecparam", "-name", "prime256v1", "-genkey", "-noout"]), mode=0o600)
