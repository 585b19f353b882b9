"""Reports, contact sheets and exports of campaigns; verification and reproduction of finished pictures."""
