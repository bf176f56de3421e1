"""The methods around Net-Trim, each in a file of its own and written from its paper, behind the contract in `contract`."""
