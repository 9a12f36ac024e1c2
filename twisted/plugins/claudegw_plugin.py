"""``twistd claudegw``.  It imports nothing of ours: Klein would install a reactor."""

from twisted.application.service import ServiceMaker

claudegw = ServiceMaker(
    "claudegw", "gateway.service", "Claude Code on the models of this machine.", "claudegw"
)
