"""The pages of the board: each file draws one tab, or what stands above them all."""
