"""The subcommands of ``nettrim``, one file each: they parse, show and exit; the work is done elsewhere."""
