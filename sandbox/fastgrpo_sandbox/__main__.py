"""`python -m fastgrpo_sandbox`: can this machine run jails, and if not, what to do."""

import sys

from fastgrpo_sandbox.doctor import main

sys.exit(main())
