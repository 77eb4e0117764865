// Locks on snapshot names. A call claims every name it is about to create, change or erase exclusively, and
// the parents it relies on as shared; all or nothing, so claims cannot deadlock. Held only around one
// metadata change (check, then write), never while the network is waited for. Readers (Stat, List) claim
// nothing.
#pragma once

#include <map>
#include <set>
#include <string>
#include <utility>

#include "common/mutex.h"

namespace holdfast::snapshot {

class Claims {
 public:
  // Releases the names in its destructor.
  class Hold {
   public:
    Hold(Claims* owner, std::set<std::string> exclusive, std::set<std::string> shared)
        : owner_(owner), exclusive_(std::move(exclusive)), shared_(std::move(shared)) {}
    Hold(const Hold&) = delete;
    Hold& operator=(const Hold&) = delete;
    ~Hold() { owner_->Release(exclusive_, shared_); }

   private:
    Claims* const owner_;
    const std::set<std::string> exclusive_, shared_;
  };

  // Waits until all names are free. Empty names and names in both sets are handled; exclusive wins.
  Hold Take(std::set<std::string> exclusive, std::set<std::string> shared = {}) {
    exclusive.erase("");
    shared.erase("");
    for (const std::string& name : exclusive) shared.erase(name);
    MutexLock lock(&mutex_);
    while (!Free(exclusive, shared)) released_.Wait(&mutex_);
    for (const std::string& name : exclusive) holders_[name] = kExclusive;
    for (const std::string& name : shared) holders_[name]++;
    return Hold(this, std::move(exclusive), std::move(shared));
  }

 private:
  static constexpr int kExclusive = -1;

  bool Free(const std::set<std::string>& exclusive, const std::set<std::string>& shared) const
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    for (const std::string& name : exclusive) {
      if (holders_.count(name) != 0) return false;
    }
    for (const std::string& name : shared) {
      auto it = holders_.find(name);
      if (it != holders_.end() && it->second == kExclusive) return false;
    }
    return true;
  }

  void Release(const std::set<std::string>& exclusive, const std::set<std::string>& shared) {
    MutexLock lock(&mutex_);
    for (const std::string& name : exclusive) holders_.erase(name);
    for (const std::string& name : shared) {
      auto it = holders_.find(name);
      if (--it->second == 0) holders_.erase(it);
    }
    released_.SignalAll();
  }

  Mutex mutex_;
  CondVar released_;
  std::map<std::string, int> holders_ ABSL_GUARDED_BY(mutex_);  // shared count, or kExclusive
};

}  // namespace holdfast::snapshot
