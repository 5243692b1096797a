package keystore

import (
	"fmt"
	"io/fs"
	"os"
	"unsafe"

	"golang.org/x/sys/windows"
)

// The rights with which somebody can read or write a file.
const (
	mayRead  = windows.GENERIC_READ | windows.GENERIC_ALL | windows.FILE_READ_DATA
	mayWrite = windows.GENERIC_WRITE | windows.GENERIC_ALL | windows.FILE_WRITE_DATA | windows.FILE_APPEND_DATA |
		windows.DELETE | windows.WRITE_DAC | windows.WRITE_OWNER
)

// everybody are groups that hold users at large.
var everybody = []windows.WELL_KNOWN_SID_TYPE{
	windows.WinWorldSid, windows.WinAuthenticatedUserSid, windows.WinBuiltinUsersSid, windows.WinBuiltinGuestsSid, windows.WinAnonymousSid,
}

// allowed returns a group of users at large that has one of these rights to a file by its
// access control list, or "".
func allowed(name string, rights windows.ACCESS_MASK) (group string, err error) {
	security, err := windows.GetNamedSecurityInfo(name, windows.SE_FILE_OBJECT, windows.DACL_SECURITY_INFORMATION)
	if err != nil {
		return "", err
	}
	list, _, err := security.DACL()
	if err != nil {
		return "", err
	}
	if list == nil {
		return "Everyone", nil
	}
	for i := range uint32(list.AceCount) {
		var entry *windows.ACCESS_ALLOWED_ACE
		if err := windows.GetAce(list, i, &entry); err != nil {
			return "", err
		}
		if entry.Header.AceType != windows.ACCESS_ALLOWED_ACE_TYPE || entry.Header.AceFlags&windows.INHERIT_ONLY_ACE != 0 || entry.Mask&rights == 0 {
			continue
		}
		sid := (*windows.SID)(unsafe.Pointer(&entry.SidStart))
		for _, t := range everybody {
			if sid.IsWellKnown(t) {
				if account, _, _, err := sid.LookupAccount(""); err == nil {
					return account, nil
				}
				return sid.String(), nil
			}
		}
	}
	return "", nil
}

// checkDir does nothing: a store is written on Linux only.
func checkDir(string) error { return nil }

func isFSGroup(fs.FileInfo) bool { return false }

// checkFile rejects a file of a store that users at large can read, if forbidden has that,
// or write, by its access control list. Other accounts that it names are not looked at.
func checkFile(name string, _ fs.FileInfo, forbidden fs.FileMode, what, _ string) error {
	rights := windows.ACCESS_MASK(mayWrite)
	if forbidden&0o044 != 0 {
		rights |= mayRead
	}
	group, err := allowed(name, rights)
	if err != nil {
		return fmt.Errorf("%s: its access control list: %w", name, err)
	}
	if group != "" {
		return fmt.Errorf("%s can be %s by %s: run \"icacls %[1]s /inheritance:r /grant:r %%USERNAME%%:F\"", name, what, group)
	}
	return nil
}

// CheckOwner does nothing: there is no admin socket on Windows.
func CheckOwner(string, fs.FileInfo) error { return nil }

func giveToOwner(*os.File) error { return nil }
