# Android 8 and later on arm64, with the NDK's clang; ANDROID_NDK_HOME says where the NDK is.
# 16 KiB pages, which newer devices have, are what windows of weights are counted in anyway.
set(ANDROID_ABI arm64-v8a)
set(ANDROID_PLATFORM android-26)
set(ANDROID_STL c++_static)
set(ANDROID_SUPPORT_FLEXIBLE_PAGE_SIZES ON)
if(NOT DEFINED ENV{ANDROID_NDK_HOME})
  message(FATAL_ERROR "ANDROID_NDK_HOME is not set: it must name the folder of an NDK, r26 or later")
endif()
include("$ENV{ANDROID_NDK_HOME}/build/cmake/android.toolchain.cmake")
