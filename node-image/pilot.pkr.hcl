# The same node as build.sh makes, out of Debian's cloud image:
#
#   packer build -var deb=pilot_1.0.0-1_amd64.deb pilot.pkr.hcl
#
# qemu's builder stands for any other: those of clouds need another source, and
# the same build.

variable "deb" {
  type        = string
  description = "Debian package of pilot."
}

variable "debian" {
  type        = string
  description = "Debian 13's cloud image: a URL or a path."
  default     = "https://cloud.debian.org/images/cloud/trixie/latest/debian-13-genericcloud-amd64.qcow2"
}

variable "debian_checksum" {
  type    = string
  default = "file:https://cloud.debian.org/images/cloud/trixie/latest/SHA512SUMS"
}

variable "accelerator" {
  type        = string
  description = "Set it to tcg where there is no KVM."
  default     = "kvm"
}

locals {
  # Packer logs in with a password that holds for this build alone, and that
  # seal.sh takes away.
  password = uuidv4()
}

source "qemu" "node" {
  iso_url          = var.debian
  iso_checksum     = var.debian_checksum
  disk_image       = true
  disk_size        = "4G"
  format           = "raw"
  output_directory = "pilot-node"
  vm_name          = "pilot-node.raw"
  accelerator      = var.accelerator
  headless         = true
  memory           = 1024
  net_device       = "virtio-net"
  disk_interface   = "virtio"
  ssh_username     = "debian"
  ssh_password     = local.password
  ssh_timeout      = "20m"
  shutdown_command = "sudo poweroff"
  # cloud-init reads this as a NoCloud seed.
  qemuargs = [["-smbios", "type=1,serial=ds=nocloud-net;s=http://{{ .HTTPIP }}:{{ .HTTPPort }}/"]]
}
