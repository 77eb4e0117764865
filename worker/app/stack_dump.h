// On SIGQUIT the thread that got it writes its own stack to standard error, so that the supervisor can see
// what each thread of a hung worker does (it sends the signal to one thread after the other): a line
// "worker.stack thread=NAME tid=N", then one line a frame.
//
// The handler allocates nothing and takes no lock of the process but the dynamic linker's, through which
// frames are found. A thread that holds that one stays silent; so does one in an uninterruptible sleep.
#pragma once

namespace holdfast::app {

// Once, before any thread is started: a thread blocks the signal if its maker does.
void InstallStackDump();

}  // namespace holdfast::app
