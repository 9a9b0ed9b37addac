// What Python sets and reads of the emulator in a library of emulated operators.
#include "emulator.h"

extern "C" {

// Sets the order of threads and blocks, and a barrier that does nothing: the synchronisation
// at a line of a file; none where the line is 0.
void hkd_emulator_configure(uint64_t seed, const char* dropped_file, int dropped_line) {
  auto& machine = hkd::emulator::machine;
  machine.seed = seed;
  machine.dropped_file = dropped_file;
  machine.dropped_line = dropped_line;
}

// Launches since the library was loaded.
int hkd_emulator_launches() {
  return hkd::emulator::machine.launches;
}

// Names of the kernels that ran since the library was loaded, one a line.
const char* hkd_emulator_ran() {
  static std::string names;
  names.clear();
  for (const std::string& name : hkd::emulator::machine.ran) {
    names += name + "\n";
  }
  return names.c_str();
}
}
