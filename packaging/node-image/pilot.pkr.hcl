# The same node out of Debian's cloud image. In this folder:
#
#   packer build -var deb=../../dist/pilot_1.0.0-1_amd64.deb -var ssh_key=$HOME/.ssh/id_ed25519 pilot.pkr.hcl
#
# qemu's builder stands for any other: those of clouds need another source, and
# the same build.

variable "deb" {
  type        = string
  description = "Debian package of pilot."
}

variable "ssh_key" {
  type        = string
  description = "A private key, with the public one beside it in .pub, by which Packer logs in while it builds."
}

variable "debian" {
  type        = string
  description = "Debian 13's cloud image, a URL or a path."
  default     = "https://cloud.debian.org/images/cloud/trixie/latest/debian-13-genericcloud-amd64.qcow2"
}

variable "debian_checksum" {
  type    = string
  default = "file:https://cloud.debian.org/images/cloud/trixie/latest/SHA512SUMS"
}

variable "accelerator" {
  type        = string
  description = "Without KVM, tcg."
  default     = "kvm"
}

source "qemu" "node" {
  iso_url              = var.debian
  iso_checksum         = var.debian_checksum
  disk_image           = true
  disk_size            = "4G"
  format               = "raw"
  output_directory     = "../../dist/node-image-packer"
  vm_name              = "pilot-node.raw"
  accelerator          = var.accelerator
  headless             = true
  memory               = 1024
  http_directory       = "seed"
  ssh_username         = "root"
  ssh_private_key_file = var.ssh_key
  ssh_timeout          = "20m"
  shutdown_command     = "poweroff"
  qemuargs = [
    # cloud-init has to find something before it makes host keys.
    ["-smbios", "type=1,serial=ds=nocloud;s=http://{{ .HTTPIP }}:{{ .HTTPPort }}/"],
    ["-smbios", "type=11,value=io.systemd.credential:ssh.authorized_keys.root=${chomp(file("${var.ssh_key}.pub"))}"],
  ]
}

build {
  sources = ["source.qemu.node"]

  provisioner "file" {
    sources     = ["files", "packages", "provision.sh"]
    destination = "/var/tmp/"
  }

  provisioner "file" {
    source      = var.deb
    destination = "/var/tmp/pilot.deb"
  }

  provisioner "shell" {
    inline = [
      "cd /var/tmp",
      "export DEBIAN_FRONTEND=noninteractive",
      "apt-get -q update",
      "xargs apt-get -q -y install --no-install-recommends ./pilot.deb <packages",
      "bash ./provision.sh /",
      "rm -rf files packages provision.sh pilot.deb /root/.ssh/authorized_keys",
      "cloud-init clean --logs",
      "apt-get clean",
    ]
  }
}
