"""The rules, one file per family. Importing this package registers them all."""

from qverify.frontend.rules import averages, elementwise, layout, linear, quantize, softmax, windows

__all__ = ["averages", "elementwise", "layout", "linear", "quantize", "softmax", "windows"]
