//! Whose process is at the other end of a TCP connection on this host.

use std::io;
use std::net::SocketAddrV4;
use std::os::fd::AsRawFd;

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, recv, sendto, socket,
};

/// `SOCK_DIAG_BY_FAMILY` of `linux/sock_diag.h`.
const BY_FAMILY: u16 = 20;
const NLM_F_REQUEST: u16 = 1;
const NLMSG_ERROR: u16 = 2;

/// Offset of `idiag_uid` in an answer: `struct nlmsghdr`, then `struct inet_diag_msg`.
const UID: usize = 16 + 4 + 48 + 12;

/// The user who owns the socket that is bound to `peer` and connected to `own`, or nothing if there
/// is none any more. Asks the kernel for this one socket (sock_diag(7)): `/proc/net/tcp` would be
/// read in full for every process that an application starts.
pub fn uid(peer: SocketAddrV4, own: SocketAddrV4) -> io::Result<Option<u32>> {
    let netlink = socket(
        AddressFamily::Netlink,
        SockType::Datagram,
        SockFlag::SOCK_CLOEXEC,
        SockProtocol::NetlinkSockDiag,
    )?;
    let mut request = Vec::with_capacity(72);
    // struct nlmsghdr
    request.extend_from_slice(&72_u32.to_ne_bytes());
    request.extend_from_slice(&BY_FAMILY.to_ne_bytes());
    request.extend_from_slice(&NLM_F_REQUEST.to_ne_bytes());
    request.extend_from_slice(&[0; 8]);
    // struct inet_diag_req_v2: family, protocol, extensions, padding, states
    request.extend_from_slice(&[libc::AF_INET as u8, libc::IPPROTO_TCP as u8, 0, 0]);
    request.extend_from_slice(&u32::MAX.to_ne_bytes());
    // struct inet_diag_sockid: ports and addresses in network order, any interface, any cookie
    request.extend_from_slice(&peer.port().to_be_bytes());
    request.extend_from_slice(&own.port().to_be_bytes());
    for address in [peer.ip(), own.ip()] {
        request.extend_from_slice(&address.octets());
        request.extend_from_slice(&[0; 12]);
    }
    request.extend_from_slice(&[0; 4]);
    request.extend_from_slice(&[0xff; 8]);
    let kernel = NetlinkAddr::new(0, 0);
    sendto(netlink.as_raw_fd(), &request, &kernel, MsgFlags::empty())?;

    let mut answer = [0; 1024];
    let count = recv(netlink.as_raw_fd(), &mut answer, MsgFlags::empty())?;
    let answer = &answer[..count];
    match answer.get(4..6) {
        Some(kind) if kind == BY_FAMILY.to_ne_bytes() => match answer.get(UID..UID + 4) {
            Some(&[a, b, c, d]) => Ok(Some(u32::from_ne_bytes([a, b, c, d]))),
            _ => Err(io::ErrorKind::InvalidData.into()),
        },
        Some(kind) if kind == NLMSG_ERROR.to_ne_bytes() => match answer.get(16..20) {
            Some(&[a, b, c, d]) => {
                match Errno::from_raw(i32::from_ne_bytes([a, b, c, d]).saturating_neg()) {
                    Errno::ENOENT => Ok(None),
                    errno => Err(errno.into()),
                }
            }
            _ => Err(io::ErrorKind::InvalidData.into()),
        },
        _ => Err(io::ErrorKind::InvalidData.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{SocketAddr, TcpListener, TcpStream};

    fn v4(address: SocketAddr) -> SocketAddrV4 {
        match address {
            SocketAddr::V4(address) => address,
            SocketAddr::V6(_) => panic!("IPv6"),
        }
    }

    #[test]
    fn own_connection_is_own() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let stream = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (_accepted, peer) = listener.accept().unwrap();
        let own = v4(listener.local_addr().unwrap());
        let me = nix::unistd::getuid().as_raw();
        assert_eq!(Some(me), uid(v4(peer), own).unwrap());
        drop(stream);
        let nobody = SocketAddrV4::new([127, 0, 0, 1].into(), 1);
        assert_eq!(None, uid(nobody, own).unwrap());
    }
}
