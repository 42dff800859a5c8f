"""The digest of an atom, which does not depend on how it is cut (FORMAT.md §12): partial digests of boxes, and how they add up."""

from stormjib_checkpoint.digest.definition import VERSION, Row, add, number, text, whole
from stormjib_checkpoint.digest.geometry import Geometry, geometry
from stormjib_checkpoint.digest.native import partial

__all__ = ["VERSION", "Geometry", "Row", "add", "geometry", "number", "partial", "text", "whole"]
