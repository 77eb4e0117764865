// holdfast-cri: a client of containerd's CRI plugin for the tests, one call a command. See --help.
#include <grpcpp/grpcpp.h>

#include <chrono>
#include <iostream>
#include <memory>
#include <string>
#include <vector>

#include <CLI/CLI.hpp>
#include <nlohmann/json.hpp>

#include "tests/support/cri/runtime.grpc.pb.h"

namespace {

namespace cri = runtime::v1;
using nlohmann::json;

class Client {
 public:
  Client(const std::string& socket, int timeout_seconds)
      : channel_(grpc::CreateChannel("unix:" + socket, grpc::InsecureChannelCredentials())),
        runtime_(cri::RuntimeService::NewStub(channel_)),
        image_(cri::ImageService::NewStub(channel_)),
        timeout_(timeout_seconds) {}

  // Calls `method` of `stub`; throws with the status in words.
  template <typename Response, typename Stub, typename Method, typename Request>
  Response Call(Stub& stub, Method method, const Request& request) {
    grpc::ClientContext context;
    context.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(timeout_));
    Response response;
    grpc::Status status = (stub.get()->*method)(&context, request, &response);
    if (!status.ok()) {
      throw std::runtime_error("code " + std::to_string(status.error_code()) + ": " + status.error_message());
    }
    return response;
  }

  json Version() {
    auto r = Call<cri::VersionResponse>(runtime_, &cri::RuntimeService::Stub::Version, cri::VersionRequest());
    return {{"runtime", r.runtime_name()}, {"version", r.runtime_version()}};
  }
  json Pull(const std::string& image, const std::string& user, const std::string& password) {
    cri::PullImageRequest request;
    request.mutable_image()->set_image(image);
    if (!user.empty()) {
      request.mutable_auth()->set_username(user);
      request.mutable_auth()->set_password(password);
    }
    auto r = Call<cri::PullImageResponse>(image_, &cri::ImageService::Stub::PullImage, request);
    return {{"image_ref", r.image_ref()}};
  }
  json RemoveImage(const std::string& image) {
    cri::RemoveImageRequest request;
    request.mutable_image()->set_image(image);
    Call<cri::Empty>(image_, &cri::ImageService::Stub::RemoveImage, request);
    return json::object();
  }
  json ImageFs() {
    auto r = Call<cri::ImageFsInfoResponse>(image_, &cri::ImageService::Stub::ImageFsInfo, cri::Empty());
    json list = json::array();
    for (const auto& fs : r.image_filesystems()) {
      list.push_back({{"mountpoint", fs.fs_id().mountpoint()}, {"used_bytes", fs.used_bytes().value()}});
    }
    return list;
  }
  // A pod in the host's network: no CNI needed.
  static cri::PodSandboxConfig PodConfig(const std::string& name) {
    cri::PodSandboxConfig config;
    config.mutable_metadata()->set_name(name);
    config.mutable_metadata()->set_uid(name + "-uid");
    config.mutable_metadata()->set_namespace_("default");
    config.mutable_linux()->mutable_security_context()->mutable_namespace_options()->set_network(cri::NODE);
    return config;
  }
  json RunPod(const std::string& name) {
    cri::RunPodSandboxRequest request;
    *request.mutable_config() = PodConfig(name);
    auto r = Call<cri::RunPodSandboxResponse>(runtime_, &cri::RuntimeService::Stub::RunPodSandbox, request);
    return {{"pod", r.pod_sandbox_id()}};
  }
  json RemovePod(const std::string& pod) {
    cri::StopPodSandboxRequest stop;
    stop.set_pod_sandbox_id(pod);
    Call<cri::Empty>(runtime_, &cri::RuntimeService::Stub::StopPodSandbox, stop);
    cri::RemovePodSandboxRequest remove;
    remove.set_pod_sandbox_id(pod);
    Call<cri::Empty>(runtime_, &cri::RuntimeService::Stub::RemovePodSandbox, remove);
    return json::object();
  }
  json Run(const std::string& pod, const std::string& pod_name, const std::string& image,
           const std::vector<std::string>& command) {
    cri::CreateContainerRequest request;
    request.set_pod_sandbox_id(pod);
    *request.mutable_sandbox_config() = PodConfig(pod_name);
    request.mutable_config()->mutable_metadata()->set_name("main");
    request.mutable_config()->mutable_image()->set_image(image);
    for (const std::string& word : command) request.mutable_config()->add_command(word);
    request.mutable_config()
        ->mutable_linux()
        ->mutable_security_context()
        ->mutable_namespace_options()
        ->set_network(cri::NODE);
    auto r =
        Call<cri::CreateContainerResponse>(runtime_, &cri::RuntimeService::Stub::CreateContainer, request);
    cri::StartContainerRequest start;
    start.set_container_id(r.container_id());
    Call<cri::Empty>(runtime_, &cri::RuntimeService::Stub::StartContainer, start);
    return {{"container", r.container_id()}};
  }
  json RemoveContainer(const std::string& container) {
    cri::StopContainerRequest stop;
    stop.set_container_id(container);
    stop.set_timeout(1);
    Call<cri::Empty>(runtime_, &cri::RuntimeService::Stub::StopContainer, stop);
    cri::RemoveContainerRequest remove;
    remove.set_container_id(container);
    Call<cri::Empty>(runtime_, &cri::RuntimeService::Stub::RemoveContainer, remove);
    return json::object();
  }
  json Exec(const std::string& container, const std::vector<std::string>& command) {
    cri::ExecSyncRequest request;
    request.set_container_id(container);
    for (const std::string& word : command) request.add_cmd(word);
    request.set_timeout(timeout_);
    auto r = Call<cri::ExecSyncResponse>(runtime_, &cri::RuntimeService::Stub::ExecSync, request);
    return {{"exit_code", r.exit_code()}, {"stdout", r.stdout()}, {"stderr", r.stderr()}};
  }
  json Stats(const std::string& container) {
    cri::ContainerStatsRequest request;
    request.set_container_id(container);
    auto r = Call<cri::ContainerStatsResponse>(runtime_, &cri::RuntimeService::Stub::ContainerStats, request);
    return {{"id", r.stats().attributes().id()},
            {"writable_bytes", r.stats().writable_layer().used_bytes().value()},
            {"writable_inodes", r.stats().writable_layer().inodes_used().value()}};
  }

 private:
  std::shared_ptr<grpc::Channel> channel_;
  std::unique_ptr<cri::RuntimeService::Stub> runtime_;
  std::unique_ptr<cri::ImageService::Stub> image_;
  int timeout_;
};

}  // namespace

int main(int argc, char** argv) {
  CLI::App app{
      "Calls containerd's CRI plugin (runtime.v1) and prints the answer as JSON; exit code 1 with the status "
      "in words."};
  std::string socket, image, user, password, id, pod_name = "pod";
  std::vector<std::string> command;
  int timeout_seconds = 60;
  app.add_option("--socket", socket, "containerd's socket")->required();
  app.add_option("--timeout", timeout_seconds, "Seconds a call");
  app.require_subcommand(1);
  auto* version = app.add_subcommand("version");
  auto* pull = app.add_subcommand("pull");
  pull->add_option("image", image)->required();
  pull->add_option("--user", user);
  pull->add_option("--password", password);
  auto* remove_image = app.add_subcommand("remove-image");
  remove_image->add_option("image", image)->required();
  auto* image_fs = app.add_subcommand("image-fs");
  auto* run_pod = app.add_subcommand("run-pod");
  run_pod->add_option("name", pod_name)->required();
  auto* remove_pod = app.add_subcommand("remove-pod");
  remove_pod->add_option("pod", id)->required();
  auto* run = app.add_subcommand("run", "Create and start a container in a pod");
  run->add_option("pod", id)->required();
  run->add_option("pod-name", pod_name)->required();
  run->add_option("image", image)->required();
  run->add_option("command", command)->required();
  auto* remove = app.add_subcommand("remove", "Stop and remove a container");
  remove->add_option("container", id)->required();
  auto* exec = app.add_subcommand("exec");
  exec->add_option("container", id)->required();
  exec->add_option("command", command)->required();
  auto* stats = app.add_subcommand("stats");
  stats->add_option("container", id)->required();
  CLI11_PARSE(app, argc, argv);

  try {
    Client client(socket, timeout_seconds);
    json answer;
    if (version->parsed()) answer = client.Version();
    if (pull->parsed()) answer = client.Pull(image, user, password);
    if (remove_image->parsed()) answer = client.RemoveImage(image);
    if (image_fs->parsed()) answer = client.ImageFs();
    if (run_pod->parsed()) answer = client.RunPod(pod_name);
    if (remove_pod->parsed()) answer = client.RemovePod(id);
    if (run->parsed()) answer = client.Run(id, pod_name, image, command);
    if (remove->parsed()) answer = client.RemoveContainer(id);
    if (exec->parsed()) answer = client.Exec(id, command);
    if (stats->parsed()) answer = client.Stats(id);
    std::cout << answer.dump() << std::endl;
    return 0;
  } catch (const std::exception& error) {
    std::cerr << "holdfast-cri: " << error.what() << '\n';
    return 1;
  }
}
