"""The card of a model, written from the files of its run alone: no trainer, no model, no torch.

What isn't in the files isn't on the card, but is named there; what only a person can know is marked "TO FILL IN".
"""

from hfkd.card.build import build_card
from hfkd.card.folder import CardError, card_of_folder, read_run, write_card
from hfkd.card.marker import is_untouched

__all__ = ["CardError", "build_card", "card_of_folder", "is_untouched", "read_run", "write_card"]
