"""Ask a program on this machine whether it is well."""

import ssl
import urllib.error
import urllib.request


def answers_ok(url: str) -> bool:
    """Say whether a GET of a local address succeeds within a second; certificates are not looked at."""
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    # A proxy of the environment must not see requests to this machine.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context))
    try:
        with opener.open(url, timeout=1) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False
