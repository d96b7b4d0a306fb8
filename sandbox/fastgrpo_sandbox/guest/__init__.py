"""The part that runs inside the jail: standard library, msgspec and the native module only.

Program:     zygote (the fork server), runtime (what a child does), wire (frames), session, tasks (what is awaited)
Tests:       syntax, names, compared, paired, guarded, asserts: read and compiled from their text, on the host, too;
             memo (what was read once)
Judged pair: judge (verdicts), peer (requests), codec and plain (values), objects (what is lent), known (the library's)
Proxies:     remote (objects and classes), mirrors (operators), kinds (functions and iterators), inherit (derived
             classes), allowed (what a solution may do to the tests'), raised, annotations, looks, around
One process: unit (unittest beside the solution), watched (what it must not change), honest and arrays (comparisons;
             arrays in the judge, too), mocks (what they say of their calls)
"""
