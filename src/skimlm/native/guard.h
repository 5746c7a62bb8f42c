// How a function ends that Python calls: no exception passes the C interface.
#pragma once
#include <new>
#include <stdexcept>

enum Status { DONE, MISFIT, NO_MEMORY, FAILED };  // native/__init__.py has the same

// Runs body(), which returns a status or nothing.
template <class Body>
int guarded(const Body& body) noexcept {
  try {
    if constexpr (requires { int(body()); }) return body();
    body();
    return DONE;
  } catch (const std::bad_alloc&) {
    return NO_MEMORY;
  } catch (const std::length_error&) {  // of a vector: more than could ever be had
    return NO_MEMORY;
  } catch (...) {
    return FAILED;
  }
}
