"""Public weights files: names, sources and published metrics. Imports only the standard library."""

from typing import NamedTuple

SOURCE_URL = "https://download.pytorch.org/models"


class PublicWeights(NamedTuple):
    """Weights file of torchvision. Its name ends in the first 8 digits of its SHA-256.

    flags: settings that use it. metric: as published, in percent.
    """

    file: str
    data: str
    metric: str
    flags: str

    @property
    def url(self) -> str:
        """Address of the file."""
        return f"{SOURCE_URL}/{self.file}"


def _backbone(file: str, accuracy: float) -> PublicWeights:
    return PublicWeights(file, "ImageNet-1k", f"top-1 accuracy {accuracy}", "--pretrained-backbone FILE")


# torchvision's first weights of each network, except resnet34, for which MLPerf Training names an earlier file.
PUBLIC_WEIGHTS = {
    "resnet18": _backbone("resnet18-f37072fd.pth", 69.8),
    "resnet34": _backbone("resnet34-333f7ec4.pth", 73.3),
    "resnet50": _backbone("resnet50-0676ba61.pth", 76.1),
    "resnet101": _backbone("resnet101-63fe2227.pth", 77.4),
    "resnet152": _backbone("resnet152-394f9c45.pth", 78.3),
    "resnext50_32x4d": _backbone("resnext50_32x4d-7cdf4587.pth", 77.6),
    "resnext101_32x8d": _backbone("resnext101_32x8d-8ba56ff5.pth", 79.3),
    "maskrcnn": PublicWeights(
        "maskrcnn_resnet50_fpn_coco-bf2d0c1e.pth",
        "COCO 2017",
        "box AP 37.9, mask AP 34.6",
        "BENCHMARK=maskrcnn --variant torchvision --weights FILE",
    ),
    "retinanet": PublicWeights(
        "retinanet_resnet50_fpn_coco-eeacb38b.pth",
        "COCO 2017",
        "box AP 36.4",
        "BENCHMARK=retinanet --backbone resnet50 --weights FILE",
    ),
}
