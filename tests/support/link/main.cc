// holdfast-link: joins two network namespaces by an emulated link (rate, delay, tail-drop queue), because the
// kernels we test on have no netem. A TUN device in each namespace; this process carries the packets.
#include <fcntl.h>
#include <linux/if_tun.h>
#include <net/if.h>
#include <poll.h>
#include <sched.h>
#include <spawn.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <csignal>
#include <cstdio>
#include <cstring>
#include <ctime>
#include <fstream>
#include <iostream>
#include <stdexcept>
#include <thread>
#include <vector>

#include <CLI/CLI.hpp>

#include "common/io.h"
#include "tests/support/link/shaper.h"

extern char** environ;

namespace {

using holdfast::UniqueFd;

std::atomic<bool> stop{false};

uint64_t Now() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return static_cast<uint64_t>(now.tv_sec) * 1'000'000'000 + static_cast<uint64_t>(now.tv_nsec);
}

[[noreturn]] void Die(const std::string& what) {
  throw std::runtime_error(what + ": " + std::strerror(errno));
}

void RunIp(std::vector<std::string> args) {
  args.insert(args.begin(), "ip");
  std::vector<char*> argv;
  for (std::string& arg : args) argv.push_back(arg.data());
  argv.push_back(nullptr);
  pid_t pid = 0;
  if (posix_spawnp(&pid, "ip", nullptr, nullptr, argv.data(), environ) != 0) Die("ip");
  int status = 0;
  if (waitpid(pid, &status, 0) < 0 || status != 0) throw std::runtime_error("ip failed: " + args.back());
}

// Makes this thread enter the namespace, creates the device there and configures it.
UniqueFd MakeTun(const std::string& netns, const std::string& address) {
  auto ns = holdfast::OpenFile("/run/netns/" + netns, O_RDONLY);
  if (!ns.ok()) throw std::runtime_error(ns.status().ToString());
  if (setns(ns->get(), CLONE_NEWNET) != 0) Die("setns " + netns);
  UniqueFd tun(open("/dev/net/tun", O_RDWR | O_CLOEXEC | O_NONBLOCK));
  if (!tun.valid()) Die("open /dev/net/tun");
  ifreq request = {};
  request.ifr_flags = IFF_TUN | IFF_NO_PI;
  std::strncpy(request.ifr_name, "link0", IFNAMSIZ - 1);
  if (ioctl(tun.get(), TUNSETIFF, &request) != 0) Die("TUNSETIFF");
  RunIp({"address", "add", address, "dev", "link0"});
  RunIp({"link", "set", "lo", "up"});
  RunIp({"link", "set", "link0", "up", "txqueuelen", "1000"});
  return tun;
}

// Carries packets one way until told to stop.
void Carry(int from, int to, holdfast::link::Shaper* shaper) {
  prctl(PR_SET_TIMERSLACK, 1000UL);
  char buffer[65536];
  while (!stop) {
    while (shaper->NextDue() && *shaper->NextDue() <= Now()) {
      std::string packet = shaper->Pop();
      (void)!write(to, packet.data(), packet.size());  // the receiver's full queue drops, as a network would
    }
    timespec wait = {0, 100'000'000};
    if (auto due = shaper->NextDue()) {
      uint64_t now = Now();
      uint64_t nanos = *due > now ? *due - now : 0;
      if (nanos < 100'000'000) wait.tv_nsec = static_cast<long>(nanos);
    }
    pollfd readable = {from, POLLIN, 0};
    if (ppoll(&readable, 1, &wait, nullptr) <= 0) continue;
    ssize_t n = read(from, buffer, sizeof buffer);
    if (n > 0) shaper->Push(Now(), std::string(buffer, static_cast<size_t>(n)));
  }
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App app{
      "Joins two network namespaces (ip netns add ...) by an emulated link. Ends on SIGTERM and then prints "
      "the "
      "bytes carried each way."};
  std::string ns_a, ns_b, ip_a = "10.77.0.1/30", ip_b = "10.77.0.2/30", ready_file;
  double mbit = 100, rtt_ms = 20;
  uint64_t queue_kib = 512;
  app.add_option("--ns-a", ns_a)->required();
  app.add_option("--ns-b", ns_b)->required();
  app.add_option("--ip-a", ip_a);
  app.add_option("--ip-b", ip_b);
  app.add_option("--mbit", mbit, "Rate of each direction in Mbit/s");
  app.add_option("--rtt-ms", rtt_ms, "Round-trip time; half of it each way");
  app.add_option("--queue-kib", queue_kib, "Queue at the bottleneck");
  app.add_option("--ready-file", ready_file, "Created when packets flow");
  CLI11_PARSE(app, argc, argv);

  std::signal(SIGTERM, [](int) { stop = true; });
  std::signal(SIGINT, [](int) { stop = true; });
  try {
    UniqueFd a, b;
    std::string error;
    // In threads of their own, so the main thread stays in its namespace.
    std::thread([&] {
      try {
        a = MakeTun(ns_a, ip_a);
      } catch (const std::exception& e) {
        error = e.what();
      }
    }).join();
    std::thread([&] {
      try {
        b = MakeTun(ns_b, ip_b);
      } catch (const std::exception& e) {
        error = e.what();
      }
    }).join();
    if (!error.empty()) throw std::runtime_error(error);
    auto rate = static_cast<uint64_t>(mbit * 1e6);
    auto delay = static_cast<uint64_t>(rtt_ms / 2 * 1e6);
    holdfast::link::Shaper forward(rate, delay, queue_kib * 1024), backward(rate, delay, queue_kib * 1024);
    std::thread one(Carry, a.get(), b.get(), &forward), other(Carry, b.get(), a.get(), &backward);
    if (!ready_file.empty()) std::ofstream(ready_file) << "ready\n";
    one.join();
    other.join();
    std::cout << "{\"a_to_b_bytes\":" << forward.bytes() << ",\"b_to_a_bytes\":" << backward.bytes()
              << ",\"dropped\":" << forward.dropped() + backward.dropped() << "}" << std::endl;
    return 0;
  } catch (const std::exception& e) {
    std::cerr << "holdfast-link: " << e.what() << '\n';
    return 1;
  }
}
