"""What is proven before a number is printed: strict N:M, and an unchanged dense model."""

from nmbench.verification.strict import check_masks, check_strict, masks_digest

__all__ = ["check_masks", "check_strict", "masks_digest"]
