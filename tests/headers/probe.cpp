// Never compiled: CMake asks this unit's target for its flags.
