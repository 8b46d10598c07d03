"""Several runs, or the stages of one, held against each other item by item."""
