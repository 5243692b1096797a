// Package node holds no code. The packages below it set pilot up on a machine with
// containerd or CRI-O, and examine the result, which is "pilot node …":
//
//   - install: pilot's files and units, and its part of containerd's configuration,
//     which containerd_dropin.go makes: install, refresh, uninstall.
//   - doctor: tries the whole chain by which the machine decrypts images.
//   - daemonset: keeps pilot installed from a pod.
//
// They use, and these do not know of them:
//
//   - containerd, crio, docker: which of them the machine has, and how it is configured.
//   - host: the machine's files, systemd units and processes, also below a root
//     directory that is not this machine's.
//   - sandbox: runs programs of such a root directory.
package node
