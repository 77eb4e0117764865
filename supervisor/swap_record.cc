#include "supervisor/swap_record.h"

#include <map>

#include "common/log.h"
#include "glog/logging.h"

namespace holdfast::supervisor {
namespace {

// The machine's phases as people see them.
const std::map<Phase, const char*> kSteps = {
    {Phase::kStarting, "start"}, {Phase::kPreparing, "prepare"},       {Phase::kRehearsing, "rehearse"},
    {Phase::kParking, "park"},   {Phase::kServing, "serve"},           {Phase::kProbing, "probe"},
    {Phase::kYielding, "yield"}, {Phase::kAwaitingExit, "await-exit"}, {Phase::kCommitting, "commit"}};

}  // namespace

void SwapRecord::Ask(const std::string& kind, kj::Maybe<schema::Progress::Client> progress) {
  asked_ = true;
  asked_kind_ = kind;
  steps_.clear();
  step_failed_ = false;
  progress_due_.clear();
  progress_ = kj::mv(progress);
}

void SwapRecord::NotePhase(Phase from, Phase to, bool upgrade) {
  bool begins = to == Phase::kStarting && upgrade;
  if (!begins && !begun_) return;
  bool forward = begins || (to > from && (to <= Phase::kCommitting || from == Phase::kCommitting) &&
                            to <= Phase::kRunning);
  // After the step that failed there are no more, also where the owner is replaced after that.
  forward = forward && !step_failed_;
  step_failed_ = !forward;
  EndStep(forward);
  if (auto step = kSteps.find(to); forward && step != kSteps.end()) BeginStep(step->second);
  // Whoever watches would wake up and take the processor from the workers, for which reads wait.
  if (to != Phase::kParking && to != Phase::kServing) TellProgress();
}

void SwapRecord::BeginStep(const std::string& name) {
  steps_.push_back({.name = name, .begun_boot_nanos = clock_.BootNanos()});
  progress_due_.push_back({steps_.back(), false});
}

void SwapRecord::EndStep(bool ok) {
  if (steps_.empty() || steps_.back().nanos != 0) return;
  Step& step = steps_.back();
  step.nanos = clock_.BootNanos() - step.begun_boot_nanos;
  if (!ok) return;
  LOG(INFO) << "event=step name=" << step.name << " ns=" << step.nanos << " detail=" << LogValue(step.detail);
  progress_due_.push_back({step, true});
}

void SwapRecord::Detail(const std::string& text) {
  if (begun_ && !steps_.empty()) steps_.back().detail = text;
}

void SwapRecord::TellProgress() {
  for (const auto& [step, done] : std::exchange(progress_due_, {})) {
    KJ_IF_MAYBE (progress, progress_) {
      auto request = progress->stepRequest();
      Fill(step, request.initStep());
      request.setDone(done);
      request.send().ignoreResult().detach([](kj::Exception&&) {});
    }
  }
}

void SwapRecord::Begin(const std::string& kind, const std::string& from_build) {
  last_ = {.kind = kind, .result = "running", .from_build = from_build};
}

void SwapRecord::Finish(const std::string& result, const std::string& to_build) {
  if (last_.result != "running") return;
  last_.result = result;
  last_.finished_wall_nanos = clock_.WallNanos();
  last_.to_build = to_build;
  if (begun_) {
    EndStep(result == "done");
    last_.steps = steps_;
    if (result != "done" && !steps_.empty()) last_.steps.back().detail = result;
  }
  if (result == "done") ++swaps_;
  LOG(INFO) << "event=swap kind=" << last_.kind << " result=" << LogValue(result)
            << " pause_ns=" << last_.pause_nanos << " requests_carried_over=" << last_.carried_over;
}

void SwapRecord::ReadsStopped(uint64_t boot_nanos) {
  if (reads_stopped_boot_nanos_ == 0 || boot_nanos < reads_stopped_boot_nanos_)
    reads_stopped_boot_nanos_ = boot_nanos;
}

void SwapRecord::ReadsTakenOver(Generation by, bool from_another) {
  if (reads_stopped_boot_nanos_ == 0) return;
  last_.pause_nanos += clock_.BootNanos() - std::exchange(reads_stopped_boot_nanos_, 0);
  if (from_another) carried_over_ += last_.carried_over;
  LOG(INFO) << "event=reads_taken_over generation=" << by << " pause_ns=" << last_.pause_nanos
            << " requests_carried_over=" << last_.carried_over;
}

void SwapRecord::Restore(uint64_t swaps, uint64_t carried_over) {
  swaps_ = swaps;
  carried_over_ = carried_over;
}

void SwapRecord::Fill(const Step& step, schema::SwapStep::Builder out) {
  out.setName(step.name.c_str());
  out.setNanos(step.nanos);
  out.setDetail(step.detail.c_str());
}

void SwapRecord::FillLast(schema::SwapStatus::Builder out) const {
  out.setKind(last_.kind.c_str());
  out.setResult(last_.result.c_str());
  out.setFinishedWallNanos(last_.finished_wall_nanos);
  out.setPauseNanos(last_.pause_nanos);
  out.setRequestsCarriedOver(last_.carried_over);
  out.setFromBuild(last_.from_build.c_str());
  out.setToBuild(last_.to_build.c_str());
  auto steps = out.initSteps(static_cast<unsigned>(last_.steps.size()));
  for (unsigned i = 0; i < steps.size(); ++i) Fill(last_.steps[i], steps[i]);
}

void SwapRecord::FillInProgress(schema::Status::Builder out) const {
  if (!asked_) return;
  auto steps = out.initInProgress(static_cast<unsigned>(steps_.size()));
  for (unsigned i = 0; i < steps.size(); ++i) Fill(steps_[i], steps[i]);
}

}  // namespace holdfast::supervisor
