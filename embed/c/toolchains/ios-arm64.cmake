# iOS 15 and later on devices, with Xcode's clang, on a Mac.
set(CMAKE_SYSTEM_NAME iOS)
set(CMAKE_SYSTEM_PROCESSOR arm64)
set(CMAKE_OSX_ARCHITECTURES arm64)
set(CMAKE_OSX_DEPLOYMENT_TARGET 15.0)
set(FERRO_EXAMPLE OFF CACHE BOOL "a phone has no terminal")
