"""Every use of what another library keeps private or does not document: one file a library, each use with its reason.

When a library moves, the test of that use fails and names the line here. Nothing else in loraplex reaches past a
library's public names, which a test checks too.
"""
