"""For all tests."""

import hypothesis

# How long an example takes is a matter of what else the machine does; a test that never ends meets pytest's timeout.
hypothesis.settings.register_profile("lyrics", deadline=None)
hypothesis.settings.load_profile("lyrics")
