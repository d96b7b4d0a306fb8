"""`python -m fastgrpo_sandbox`: can this machine run jails, and if not, what to do. `... serve`: jails over HTTP."""

import sys

if sys.argv[1:2] == ["serve"]:
    from fastgrpo_sandbox.serving.main import main as serve

    sys.exit(serve(sys.argv[2:]))

from fastgrpo_sandbox.doctor import main

sys.exit(main())
