"""`python -m fastgrpo_sandbox`: can this machine run jails, and if not, what to do. `... serve`: jails over HTTP."""

import sys

if sys.argv[1:2] == ["serve"]:
    from fastgrpo_sandbox.serving.main import main as serve

    sys.exit(serve(sys.argv[2:]))

if sys.argv[1:]:
    wanted = sys.argv[1] in ("-h", "--help")
    said = __doc__ if wanted else f"error: {sys.argv[1]!r} is no command: give none, or `serve` (and --help)"
    print(said, file=sys.stdout if wanted else sys.stderr)
    sys.exit(0 if wanted else 2)

from fastgrpo_sandbox.doctor import main

sys.exit(main())
