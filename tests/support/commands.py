"""Commands of the workloads, run in this process."""

from detection import cli
from maskrcnn.__main__ import COMMANDS as MASKRCNN
from retinanet.__main__ import COMMANDS as RETINANET
from ssd.__main__ import COMMANDS as SSD


def ssd(*words: object) -> int:
    return cli.main([str(word) for word in words], SSD)


def maskrcnn(*words: object) -> int:
    return cli.main([str(word) for word in words], MASKRCNN)


def retinanet(*words: object) -> int:
    return cli.main([str(word) for word in words], RETINANET)
