#!/usr/bin/env python3
"""packaging/holdfast.service has every setting that the handover depends on, and none that would take its mounts from
containerd or its descriptors from it (docs/HANDOVER.md). The check is itself checked: the unit without a required setting, or
with a forbidden one, must be refused. Argument: source folder."""
import pathlib
import sys

REQUIRED = {
    ("Unit", "StartLimitIntervalSec"): "0",
    ("Service", "Type"): "notify",
    ("Service", "NotifyAccess"): "main",
    ("Service", "Restart"): "always",
    ("Service", "KillMode"): "process",
    ("Service", "KillSignal"): "SIGTERM",
    ("Service", "OOMPolicy"): "continue",
    ("Service", "OOMScoreAdjust"): "-900",
    ("Service", "ManagedOOMPreference"): "omit",
    ("Service", "Delegate"): "yes",
    ("Service", "LimitCORE"): "0",
    ("Service", "ExecReload"): "/usr/bin/holdfastctl upgrade --reexec",
}
# Three descriptors a mount and 64, at the 10,000 mounts that the tests go to.
AT_LEAST = {("Service", "FileDescriptorStoreMax"): 3 * 10_000 + 64, ("Service", "LimitNOFILE"): 524_288}
NAMESPACE = """
    PrivateTmp PrivateDevices PrivateMounts PrivateUsers PrivateNetwork PrivateIPC DynamicUser
    ProtectSystem ProtectHome ProtectProc ProtectClock ProtectHostname ProtectControlGroups ProtectKernelTunables
    ProtectKernelModules ProtectKernelLogs ProcSubset ReadWritePaths ReadOnlyPaths InaccessiblePaths ExecPaths NoExecPaths
    NetworkNamespacePath IPCNamespacePath JoinsNamespaceOf BindPaths BindReadOnlyPaths TemporaryFileSystem MountFlags
    MountAPIVFS MountImages ExtensionImages ExtensionDirectories RootDirectory RootImage RootHash LogNamespace LoadCredential
    LoadCredentialEncrypted SetCredential SetCredentialEncrypted""".split()
OTHER = """
    DevicePolicy DeviceAllow RuntimeDirectory User Group MemoryMax MemoryHigh WatchdogSec RuntimeMaxSec
    RestrictRealtime CapabilityBoundingSet LimitRTPRIO LimitRTTIME""".split()


def parse(text):
    """{(section, key): value} and what is wrong with the text itself. A key that is set twice is wrong: the last would win."""
    settings, problems, section = {}, [], ""
    for number, line in enumerate(text.splitlines(), 1):
        line = line.strip()
        if not line or line[0] in "#;":
            continue
        if line[0] == "[" and line[-1] == "]":
            section = line[1:-1]
        elif "=" in line:
            key, value = (part.strip() for part in line.split("=", 1))
            if (section, key) in settings:
                problems.append(f"line {number}: {key} is set twice")
            settings[section, key] = value
        else:
            problems.append(f"line {number}: neither a section nor a setting")
    return settings, problems


def check(text):
    settings, problems = parse(text)
    for (section, key), value in REQUIRED.items():
        if settings.get((section, key)) != value:
            problems.append(f"[{section}] {key}={value} is required, it is {settings.get((section, key))}")
    for (section, key), least in AT_LEAST.items():
        value = settings.get((section, key), "")
        if not value.isdigit() or int(value) < least:
            problems.append(f"[{section}] {key} must be a number of at least {least}, it is '{value}'")
    if settings.get(("Service", "Environment")) != "FDSTORE=" + settings.get(("Service", "FileDescriptorStoreMax"), ""):
        problems.append("[Service] Environment=FDSTORE= must be the number of FileDescriptorStoreMax")
    for (section, key), value in settings.items():
        if key in NAMESPACE:
            problems.append(f"[{section}] {key}={value} gives the service a mount namespace of its own")
        elif key in OTHER:
            problems.append(f"[{section}] {key} is forbidden (the unit's comment says why)")
    for key in NAMESPACE + OTHER:
        if key not in text:
            problems.append(f"the unit's comment does not warn of {key}")
    return problems


def blind_spots(text):
    """Settings whose loss or presence check() would not notice."""
    missed = []
    for _, key in [*REQUIRED, *AT_LEAST, ("Service", "Environment")]:
        without = "\n".join(line for line in text.splitlines() if not line.startswith(key + "="))
        if without == text.rstrip("\n") or not check(without):
            missed.append(f"the check does not notice that {key} is missing")
    for key in NAMESPACE + OTHER:
        if not check(text.replace("[Service]\nType", f"[Service]\n{key}=yes\nType")):
            missed.append(f"the check does not notice {key}")
    return missed


def main():
    text = (pathlib.Path(sys.argv[1]) / "packaging/holdfast.service").read_text()
    problems = check(text) or blind_spots(text)
    print("\n".join(problems) or f"{len(REQUIRED) + len(AT_LEAST)} settings are right, {len(NAMESPACE + OTHER)} are absent")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
