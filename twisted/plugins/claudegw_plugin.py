"""
``twistd claudegw``, and the endpoint ``launchd:NAME``.

Of ours it imports only what imports no Klein, which would install a reactor.
"""

from twisted.application.service import ServiceMaker

from gateway.daemon.sockets import Launchd

claudegw = ServiceMaker(
    "claudegw", "gateway.service", "Claude Code on the models of this machine.", "claudegw"
)
launchd = Launchd()
