// Ids whose folder exists before their row does: cleanup must leave them alone. Thread-safe.
#pragma once

#include <cstdint>
#include <memory>
#include <set>

#include "common/mutex.h"

namespace holdfast::snapshot {

class CreatingIds {
 public:
  // Marks an id until it is destroyed.
  class Mark {
   public:
    Mark(CreatingIds* owner, uint64_t id) : owner_(owner), id_(id) {
      MutexLock lock(&owner_->mutex_);
      owner_->ids_.insert(id);
    }
    ~Mark() {
      MutexLock lock(&owner_->mutex_);
      owner_->ids_.erase(id_);
    }
    Mark(const Mark&) = delete;
    Mark& operator=(const Mark&) = delete;
    uint64_t id() const { return id_; }

   private:
    CreatingIds* const owner_;
    const uint64_t id_;
  };

  bool Contains(uint64_t id) const {
    MutexLock lock(&mutex_);
    return ids_.count(id) != 0;
  }

 private:
  mutable Mutex mutex_;
  std::set<uint64_t> ids_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace holdfast::snapshot
