"""How long tests wait for whatever should happen at once."""

import os

#: Seconds. Long enough for a machine that is busy with other things; the mutants, which break what is waited for, have
#: less.
SOON = float(os.environ.get("TEST_PATIENCE", "60"))
